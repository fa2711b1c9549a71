"""What every room uses: settings, names, state, signals, devices."""
