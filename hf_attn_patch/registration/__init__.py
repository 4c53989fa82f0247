"""What transformers is told: functions under names, models refused, classes known."""
