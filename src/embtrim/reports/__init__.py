"""Tables and pages made from run records."""
