"""Prefix sharing for the trainer that one has: batches of another trainer's model calls run as packed rows."""
