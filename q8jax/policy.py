"""Which layer of a model runs in which recipe."""

import dataclasses
import re
from collections.abc import Iterable

from q8jax.recipe import Recipe


@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """Rules from module paths to recipes; the first that matches wins.

    A path that no rule matches is left alone. The string form, `pattern->recipe;pattern->recipe`,
    is what flags, config.json and repr show and what `parse` reads. A pattern is a regular
    expression that must match the whole path, whose parts are joined by '/'.

    Attributes:
      rules: (pattern, recipe) pairs.

    Raises:
      ValueError: no rule, a pattern that is not a regular expression or that the string form cannot
        hold, or a recipe that is none.
    """

    rules: tuple[tuple[str, Recipe], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple((p, recipe) for p, recipe in self.rules))
        if not self.rules:
            raise ValueError("A policy needs at least one rule: write pattern->recipe.")
        for pattern, recipe in self.rules:
            if not isinstance(recipe, Recipe):
                raise ValueError(f"Policy rule {pattern!r} has {recipe!r}: Recipe.parse takes strings.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Policy pattern {pattern!r} is not a regular expression: {error}.") from None
            if "->" in pattern or ";" in pattern or pattern != pattern.strip():
                raise ValueError(
                    f"Policy pattern {pattern!r} has a -> or ; or space around it, which separate "
                    "rules: use '.' for it."
                )

    def recipe_for(self, path: str) -> Recipe | None:
        """The recipe of the first rule that matches, or None."""
        rule = self._rule_for(path)
        return None if rule is None else self.rules[rule][1]

    def _rule_for(self, path: str) -> int | None:
        matching = (i for i, (pattern, _) in enumerate(self.rules) if re.fullmatch(pattern, path))
        return next(matching, None)

    def resolve(self, paths: Iterable[str]) -> dict[str, Recipe]:
        """The recipe of every path that a rule matches.

        Raises:
          ValueError: a rule that decides no path, because a silent no-op is a wrong result.
        """
        deciding = {path: self._rule_for(path) for path in paths}
        for i, (pattern, _) in enumerate(self.rules):
            if i not in deciding.values():
                shadowed = any(re.fullmatch(pattern, path) for path in deciding)
                reason = "is shadowed by earlier rules" if shadowed else "matches no layer"
                raise ValueError(
                    f"Policy rule {pattern!r} {reason}: the layers are {', '.join(sorted(deciding)) or 'none'}."
                )
        return {path: self.rules[rule][1] for path, rule in deciding.items() if rule is not None}

    def __str__(self) -> str:
        return ";".join(f"{pattern}->{recipe}" for pattern, recipe in self.rules)

    def __repr__(self) -> str:
        return f"Policy({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Inverse of str; recipes may be presets, and a recipe alone stands for every layer.

        Raises:
          ValueError: a rule without '->', or a misspelt recipe.
        """
        if "->" not in text:
            return cls(((".*", Recipe.parse(text)),))
        rules = []
        for rule in text.split(";"):
            pattern, arrow, recipe = rule.partition("->")
            if not arrow:
                raise ValueError(f"Policy rule {rule!r} has no recipe: write pattern->recipe.")
            rules.append((pattern.strip(), Recipe.parse(recipe.strip())))
        return cls(tuple(rules))
