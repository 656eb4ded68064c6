"""embtrim: right-sized embedding tables for recommender and CTR models."""
