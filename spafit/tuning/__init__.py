"""Search over plans and hyper-parameters: one space and one objective for every backend."""
