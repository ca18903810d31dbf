"""Networks of I-JEPA; importing this registers the encoders with timm."""
