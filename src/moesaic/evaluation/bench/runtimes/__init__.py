"""One model in several runtimes: what each writes, how well, and how fast."""
