"""The commands behind ``flexdpo``, one module each."""
