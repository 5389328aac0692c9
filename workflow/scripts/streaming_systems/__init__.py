"""The systems of experiment 2, each behind the same small interface (`base.Loaded`), one module per project."""
