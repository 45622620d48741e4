"""Losses and scores that several methods share."""
