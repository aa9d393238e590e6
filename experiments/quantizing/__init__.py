"""Post-training quantization of models in folders: calibrate, decide on each kernel, freeze, measure, search."""
