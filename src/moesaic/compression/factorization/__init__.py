"""Making the weights of experts products of smaller ones."""
