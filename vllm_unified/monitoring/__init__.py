"""What is seen of the deployment: every chart as data, and the report that draws them."""
