"""The methods: how a site's gradient is estimated. Pure functions of tensors; no state, no graphs."""
