"""What the Hugging Face families call things: tensors (`names`), and the entries of their config.json."""
