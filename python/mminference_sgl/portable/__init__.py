"""An SGLang platform for machines without an accelerator."""
