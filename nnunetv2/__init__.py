"""nnU-Net v2 with native federated learning."""
