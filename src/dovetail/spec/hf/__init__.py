"""Parts of the files of the Hugging Face layout that stand apart from the shape of the model."""
