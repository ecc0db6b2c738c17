"""Picture files and boxes in, embeddings out, in order and in bounded memory."""
