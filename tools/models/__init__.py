"""Commands over trained models: use, measure, convert."""
