"""What a recording goes through: functions that take a model."""
