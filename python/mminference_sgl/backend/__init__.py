"""What touches SGLang: the attention backend, and what it learns of models, requests and machines."""
