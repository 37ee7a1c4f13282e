"""On-policy distillation of language models, from a laptop to eight GPUs."""
