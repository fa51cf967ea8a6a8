"""The arithmetic of experts: a plain reference, the paths that replace it, and the choice."""
