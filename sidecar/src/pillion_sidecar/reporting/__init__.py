"""What the outside hears: reports to the controller and the metrics endpoint."""
