"""Interventions: what changes in a model's answer when an activation is changed."""
