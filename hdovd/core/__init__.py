"""What every room needs: the errors that users see, and the readers of the text files that they bring."""
