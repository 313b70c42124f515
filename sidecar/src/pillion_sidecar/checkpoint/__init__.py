"""A checkpoint on storage: whether it is committed, who may commit, which one is newest, which ones go. No torch, no pods."""
