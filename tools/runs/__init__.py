"""Commands over runs: plan, train, send to a cluster, watch and report."""
