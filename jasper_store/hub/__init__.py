"""Datasets sent to the Hugging Face Hub: which files, the card beside them, and the one commit that publishes them."""
