"""How the two trained models of the demonstration are made: `scripts/train_demo_models.py --help`."""
