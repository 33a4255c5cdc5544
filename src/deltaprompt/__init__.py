"""DeltaPrompt."""
