"""Where annotations come from: one small module a format."""
