"""What a search sees of a model: embedding sites and their gates, a survey of a module of one's own, tasks."""
