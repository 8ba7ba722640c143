"""What a trained model does: loss on held-out text, and where its router sends the tokens."""
