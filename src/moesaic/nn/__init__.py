"""What a mixture-of-experts layer is; needs torch alone."""
