"""The training program: settings, data and network, an epoch, and a run that can be continued."""
