"""One small file per Hugging Face ``model_type``."""
