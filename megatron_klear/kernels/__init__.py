"""The fused policy loss beside its plain-torch reference."""
