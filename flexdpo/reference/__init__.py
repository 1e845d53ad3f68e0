"""Log-probabilities of the reference model: computed once, kept on disk, or kept in step with the policy."""
