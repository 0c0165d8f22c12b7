"""What is exchanged: payloads, who has which version of the model, what it costs."""
