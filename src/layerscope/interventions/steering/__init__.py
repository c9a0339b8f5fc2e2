"""Steering: directions from contrasts, their strength, and what they do beside their controls."""
