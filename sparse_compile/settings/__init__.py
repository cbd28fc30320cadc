"""The methods as a user sets them: frozen, validated values, one file for each method."""
