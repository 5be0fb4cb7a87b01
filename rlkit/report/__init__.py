"""What runs came to, side by side: tables and curves."""
