"""What can be trained: a kind of data, a model for it, and how good it is. The trainer is one and the same."""
