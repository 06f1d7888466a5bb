"""The method: configuration, head patterns, plan and sparse prefill of one layer. Knows neither SGLang nor models."""
