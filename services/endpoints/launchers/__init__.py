"""What starts, observes and stops workers. Each launcher finds its workers again by itself after
this service was killed."""
