"""What ``GradientInspector`` measures, the rules that judge it, and the picture of it."""
