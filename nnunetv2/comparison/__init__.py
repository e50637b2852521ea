"""Compare federated with local and with pooled training on one's own data: nnUNetv2_fed_compare."""
