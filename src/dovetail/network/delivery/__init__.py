"""How long a demand takes on a fabric, by the quickest way to find out."""
