"""What a step takes on devices that need not be there: whether it fits, how long it takes at best, what would fit."""
