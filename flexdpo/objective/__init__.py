"""From hidden states to preference losses."""
