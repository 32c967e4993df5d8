"""The autopilot: `trim` looks for the plan that meets a budget with the least loss. Imports from report and below."""
